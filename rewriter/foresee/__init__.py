"""Planning ahead: how a model will train on a card, asked where there is neither the card nor the weights."""
