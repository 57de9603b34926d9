"""What `jaxlm bench` runs. Every benchmark prints a table, writes JSON and draws its plot."""
