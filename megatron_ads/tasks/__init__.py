"""One module per ads task: prompt, target, strict parser, metrics; ``registry`` names them all.

Other questions over the same rows are in ``variants`` (yes or no) and ``advertiser_question`` (choose from 20
candidates, put a list in order).
"""
