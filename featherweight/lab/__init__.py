"""The lab: recipe -> run -> report. The only room that knows the others."""
