"""The credit lab: tabular multi-turn processes in which every value is known, to measure credit assignment against the truth.

`process` and `difficulties` say what happens, `truth` what is exactly true of a policy, `sampling` and `records` make rollouts and the
tables that the library reads, `evidence` what a method may learn and `exact` what it would like to know, `pairs` what is compared, `study`
measures, `report` and `figures` tell. `python -m experiments.credit_lab` runs it.
"""
