"""The demo, and the real models and data sets that it and the experiments use."""
