"""The folder of a run: its log and other files, and how a run is set up, resumed and replayed."""
