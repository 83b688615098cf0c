"""How good a model is.

bits_per_byte.py  held-out loss in a unit that does not depend on the tokenizer
losses.py         held-out loss and metrics of any other objective

    evaluate = make_evaluate(decoder, byte_lengths, chunk=128)
    scores = evaluate(params, batches)
"""
