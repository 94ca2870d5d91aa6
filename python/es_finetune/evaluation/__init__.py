"""Answers of a model to a set of questions, and what they are worth."""
