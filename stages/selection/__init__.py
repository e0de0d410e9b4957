"""Which of many candidate pictures make a corpus: good ones that differ."""
