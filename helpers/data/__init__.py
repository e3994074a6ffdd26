"""Small stored results of trainings that are too long for a chapter, and the code that made them (``make data``)."""
