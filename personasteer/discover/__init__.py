"""What a fine-tune changed: predictions, character, and the features of the stream that carry it."""

from personasteer.discover.dictionary import Dictionary, DictionaryRecipe, imported_dictionary, train_dictionary
from personasteer.discover.features import Effect, Feature, rank_features, try_features
from personasteer.discover.results import Diff
from personasteer.discover.run import diff

__all__ = [
    "Dictionary",
    "DictionaryRecipe",
    "Diff",
    "Effect",
    "Feature",
    "diff",
    "imported_dictionary",
    "rank_features",
    "train_dictionary",
    "try_features",
]
