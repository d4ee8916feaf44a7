//! Ctrl-C and SIGTERM end a long run in order: namespaces, cgroups and pins are removed.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use tokio::signal::unix::{SignalKind, signal};

use crate::Error;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on, these signals only make [`check`] fail. The children of the moment end by Ctrl-C; on
/// SIGTERM they finish what they are doing.
///
/// # Errors
/// [`Error::Io`] when signals cannot be watched for.
pub fn prepare() -> Result<(), Error> {
    let failed = |source| Error::Io { operation: "watch for", subject: "Ctrl-C".into(), source };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
    let watch = move || {
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
    };
    thread::Builder::new().name("interrupt".into()).spawn(watch).map_err(failed)?;
    Ok(())
}

/// Fails once one of the signals came.
///
/// # Errors
/// [`Error::Interrupted`] then.
pub fn check() -> Result<(), Error> {
    if INTERRUPTED.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
}
