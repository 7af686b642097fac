"""Find, verify and permanently edit the features of a trained network with sparse autoencoders.

Importing this package is cheap; heavy libraries load in the modules that use them.
"""

__version__ = "0.1.0"
