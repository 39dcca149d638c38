"""What both engines share above the kernels: the model definition and the settings."""

__version__ = "0.1.0"
