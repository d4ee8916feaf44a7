//! Random numbers from a seed.

use carnet_reference::generate::Choices;

/// Makes the same choices for the same seed.
pub(crate) struct Random(fastrand::Rng);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(fastrand::Rng::with_seed(seed))
    }
}

impl Choices for Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0.u64(..end)
    }
}
