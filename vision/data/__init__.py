"""Image data modules. Each is a `salve_lm.data.labelled.LabelledData`."""

from vision.data.cifar100 import CIFAR100
from vision.data.cue import CueContrast
from vision.data.digits import Digits
from vision.data.folder import ImageFolder
from vision.data.imagenette import Imagenette
from vision.data.planted import PlantedShortcut

__all__ = ["CIFAR100", "CueContrast", "Digits", "ImageFolder", "Imagenette", "PlantedShortcut"]
