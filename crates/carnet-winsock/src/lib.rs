//! Windows Sockets' calling contract for redirect services, on Carnet's engine.
