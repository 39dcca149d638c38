"""The package that SGLang's model registry reads: every module's ``EntryClass``."""
