"""Which of several candidates is a model made from?"""
