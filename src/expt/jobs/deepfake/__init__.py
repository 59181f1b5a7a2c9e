"""Telling tampered videos from genuine ones, frame by frame and over time."""
