"""The old packages' classes as slow formulas over their own names of weights: what the loaded modules are held against.

Each file has, by class, `shapes(arguments)`: the names and shapes of its state_dict, a name in place of a shape where
one weight stands under two names; and `run(weights, inputs, arguments, options)`: the outputs by the records' names.
"""
