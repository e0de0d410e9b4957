"""Pictures to captions, by the models of transformers that say what they see."""
