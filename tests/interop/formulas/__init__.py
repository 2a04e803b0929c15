"""The upstream classes as explicit formulas over their own weight names, the oracle of the loaded modules.

Each file has, by class, `shapes(arguments)`: the names and shapes of its state_dict, with a name in place of a shape
where a weight has two names; and `run(weights, inputs, arguments, options)`: the outputs by the names of the records.
"""
