"""Whole models."""

from jaxlm.models.language_model import LanguageModel, ModelSettings

__all__ = ["LanguageModel", "ModelSettings"]
