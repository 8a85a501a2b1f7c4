"""The clear Python twin of contracts/src/referee: plain integers and bytes, file for file."""
