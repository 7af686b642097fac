"""What keeps a run whole: exact resume, whole checkpoints, pre-emption, a lost rank."""
