"""Which of several corpora helps a classifier most that is trained on real pictures and on one of them."""
