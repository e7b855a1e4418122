"""Adapters: one file per family of models, each making its models a `steerrec.Recommender`."""
