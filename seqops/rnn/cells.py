"""What tells the recurrent cells apart, for all who need no tensors to know it."""

GATES = {"lstm": 4, "gru": 3, "slstm": 4, "elman": 1}
STATES = {"lstm": ("h0", "c0"), "gru": ("h0",), "slstm": ("h0", "c0", "n0", "m0"), "elman": ("h0",)}
CACHES = {  # what <op>_forward returns beyond the results: values for each batch row, step and unit; None: one
    "lstm": (4, None),  # p, c
    "gru": (3, None),  # p, y of the candidate
    "slstm": (7,),  # i, f with the winner of the maximum in its sign, sigmoid(-p_f), p_z, p_o, c, n
    "elman": (),  # h is enough
}
