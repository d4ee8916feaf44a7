//! Ctrl-C and SIGTERM end a run in order: namespaces, cgroups and pins are removed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on, these signals only make [`check`] fail.
///
/// # Errors
/// When signals cannot be watched for.
pub(crate) fn prepare() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("cannot watch for Ctrl-C")?;
    thread::Builder::new()
        .name("interrupt".into())
        .spawn(move || {
            let signalled = runtime.block_on(async {
                let mut terminated = signal(SignalKind::terminate())?;
                tokio::select! {
                    interrupted = tokio::signal::ctrl_c() => interrupted,
                    _ = terminated.recv() => Ok(()),
                }
            });
            if signalled.is_ok() {
                INTERRUPTED.store(true, Ordering::Relaxed);
            }
        })
        .context("cannot watch for Ctrl-C")?;
    Ok(())
}

/// Fails once one of the signals came.
///
/// # Errors
/// Then.
pub(crate) fn check() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}
