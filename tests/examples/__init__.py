"""Short trainings with other libraries, to be read and copied; test_examples.py runs each on two gloo processes."""
