"""What single events cost, one file an event: its loss, its guess, its Rényi form and its attacks, registered together by `loss_rule`.

Files that register rules import `dp_accounting`, which takes two seconds: `_all` imports them when the first question is asked.
"""
