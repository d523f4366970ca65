"""What saved memory is spent on: more chains of a problem, longer chains, and the answer that they amount to."""
