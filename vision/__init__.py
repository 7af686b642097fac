"""Image classifiers, their data, and what is particular to images.

Light to import: torchvision's models, timm and scikit-learn are loaded where they are used.
"""

from vision.backbones import Backbone, build_backbone
from vision.classifier import Classifier

__all__ = ["Backbone", "Classifier", "build_backbone"]
