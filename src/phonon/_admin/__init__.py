"""What operators see and do, from outside: no process, no lanes, none of the user's classes."""
