"""Facts by a grammar: entities, relations, values, wordings, forms; whole relations, wordings, forms and the words of
names are the evaluation's alone, so that what training teaches is to keep facts and not these facts."""
