//! Reading an answer whose length is not known beforehand.
//!
//! Contract Q4, Q5, Q13, X3: how an answer that does not fit is reported differs between systems
//! and even between pages of their documentation; what to do does not. Nobody is believed without
//! bound: a system that always says "larger" ends in an error.

use crate::error::{Error, Operation};

/// The first buffer's size in bytes. No record of Carnet's is longer than half of it, and it is
/// what existing services of Windows use.
const FIRST: usize = 2048;
/// No buffer is larger, in bytes.
const LARGEST: usize = 1 << 20;
/// How often a buffer is offered.
const ATTEMPTS: usize = 8;

/// What became of one buffer that was offered.
pub(crate) enum Attempt {
    /// This many bytes were written to it.
    Filled(usize),
    /// It is too small.
    TooSmall {
        /// How many bytes were asked for, if that was told.
        needed: Option<usize>,
        /// The error to give if no buffer will do.
        otherwise: Error,
    },
}

/// Offers `attempt` ever larger buffers until one is filled.
///
/// # Errors
/// Those of `attempt`; `otherwise` of the last attempt when no buffer within the bounds would do;
/// [`Error::InvalidAnswer`] when more bytes were claimed to be written than the buffer has.
pub(crate) fn read_growing(
    operation: Operation,
    mut attempt: impl FnMut(&mut [u8]) -> Result<Attempt, Error>,
) -> Result<Vec<u8>, Error> {
    let mut buffer = vec![0; FIRST];
    let mut last = Error::InvalidAnswer { operation, length: FIRST };
    for _ in 0..ATTEMPTS {
        match attempt(&mut buffer)? {
            Attempt::Filled(length) if length > buffer.len() => {
                return Err(Error::InvalidAnswer { operation, length });
            }
            Attempt::Filled(length) => {
                buffer.truncate(length);
                return Ok(buffer);
            }
            Attempt::TooSmall { needed, otherwise } => {
                last = otherwise;
                let doubled = buffer.len() * 2;
                let larger = needed.filter(|&n| n > buffer.len()).unwrap_or(doubled);
                if larger > LARGEST {
                    break;
                }
                buffer.resize(larger, 0);
            }
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPERATION: Operation = Operation::QueryRedirectRecords;

    fn too_small(needed: Option<usize>) -> Attempt {
        Attempt::TooSmall {
            needed,
            otherwise: Error::InvalidAnswer { operation: OPERATION, length: 0 },
        }
    }

    /// A system with an answer of `length` bytes that tells, or does not tell, what it needs.
    fn ask(length: usize, tells: bool) -> (Result<Vec<u8>, Error>, Vec<usize>) {
        let mut offered = Vec::new();
        let answer = read_growing(OPERATION, |buffer| {
            offered.push(buffer.len());
            Ok(match buffer.get_mut(..length) {
                Some(target) => {
                    target.fill(7);
                    Attempt::Filled(length)
                }
                None => too_small(tells.then_some(length)),
            })
        });
        (answer, offered)
    }

    #[test]
    fn an_answer_that_fits_takes_one_attempt() {
        for length in [0, 1, FIRST] {
            let (answer, offered) = ask(length, false);
            assert_eq!(answer.unwrap(), vec![7; length]);
            assert_eq!(offered, [FIRST]);
        }
    }

    #[test]
    fn the_length_that_is_told_is_used_and_else_the_buffer_is_doubled() {
        let (answer, offered) = ask(FIRST + 1, true);
        assert_eq!(answer.unwrap().len(), FIRST + 1);
        assert_eq!(offered, [FIRST, FIRST + 1]);

        let (answer, offered) = ask(5000, false);
        assert_eq!(answer.unwrap().len(), 5000);
        assert_eq!(offered, [FIRST, 2 * FIRST, 4 * FIRST]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri clears half a megabyte byte by byte")]
    fn a_system_that_always_says_larger_is_not_believed_for_ever() {
        for told in [None, Some(0), Some(FIRST)] {
            let mut attempts = 0;
            let answer = read_growing(OPERATION, |buffer| {
                attempts += 1;
                assert!(buffer.len() <= LARGEST);
                Ok(too_small(told))
            });
            assert!(matches!(answer, Err(Error::InvalidAnswer { length: 0, .. })));
            assert_eq!(attempts, ATTEMPTS);
        }
        let (answer, offered) = ask(LARGEST + 1, true);
        assert!(answer.is_err());
        assert_eq!(offered, [FIRST]);
    }

    #[test]
    fn a_claim_beyond_the_buffer_is_an_error() {
        let answer = read_growing(OPERATION, |buffer| Ok(Attempt::Filled(buffer.len() + 1)));
        assert!(matches!(answer, Err(Error::InvalidAnswer { length, .. }) if length == FIRST + 1));
    }

    #[test]
    fn other_errors_end_it_at_once() {
        let mut attempts = 0;
        let answer = read_growing(OPERATION, |_| {
            attempts += 1;
            Err(Error::NotRedirected { operation: OPERATION })
        });
        assert!(matches!(answer, Err(Error::NotRedirected { .. })));
        assert_eq!(attempts, 1);
    }
}
