//! Programs that know nothing of Carnet, each the real one, alone and in chains: mitmproxy, squid,
//! HAProxy, Envoy and others. `cargo xtask interop` installs them and runs this.
//!
//! Every flow has to arrive, and to be once in the log of every program that it passes.

mod chains;
mod deaths;
mod far_side;
mod load;
mod local_capture;
mod matrix;
mod opensnitch;
mod pages;
mod pools;
mod product;
mod products;
mod proxy_header;
mod proxy_protocol;
mod scene;
mod systemd;
mod tor_network;
mod weak;
