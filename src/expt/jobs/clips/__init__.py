"""Clips of frames, read from video files: what the jobs on video and on deepfakes share."""
