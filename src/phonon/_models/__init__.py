"""The implementation of `phonon.Model` and `phonon.fields`."""
