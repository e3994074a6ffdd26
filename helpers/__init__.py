"""Estimators, samplers and models behind *Random Variables in Deep Learning*.

``helpers.lab`` is the bench that every chapter shares; each other module carries the name of its chapter.
"""
