"""Tests in a real browser. A package, so that a file here may be named as one in tests/widgets/."""
