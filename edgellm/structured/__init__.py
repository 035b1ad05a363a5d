"""What an answer must be: schemas, regular expressions, choices and grammars, as masks over the vocabulary."""
