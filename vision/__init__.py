"""Image classifiers, their data, and what is particular to images.

Light to import: torchvision's models, timm and scikit-learn are loaded where they are used.
"""

from vision.backbones import Backbone, build_backbone
from vision.classifier import Classifier
from vision.feature_cards import FeatureCards
from vision.fit_head import FitHead
from vision.shortcut_check import ShortcutCheck

__all__ = ["Backbone", "Classifier", "FeatureCards", "FitHead", "ShortcutCheck", "build_backbone"]
