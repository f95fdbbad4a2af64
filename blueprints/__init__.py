"""Pages and HTTP endpoints: parse, call one service, render."""
