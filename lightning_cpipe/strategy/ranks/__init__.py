"""The processes of a pipeline, as Lightning's environments start them.

launchers     starts them, and says why when they do not come back
processes     this one among the others: its groups, its watch, and how it ends
same_numbers  those of a module, as rank 0 has them
ending        the first cause is told once, and last
replicas      pipelines side by side
elsewhere     what runs on rank 0 as it would on another one
"""
