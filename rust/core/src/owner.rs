//! The fork rule: an object refuses its operations in forked children of the process that created it.

use crate::error::{Error, Result};

/// The process that created an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(u32);

impl Owner {
    /// The calling process.
    #[must_use]
    pub fn this_process() -> Self {
        Self(std::process::id())
    }

    /// Fails in any other process, such as a forked child.
    pub fn check(self) -> Result<()> {
        let caller = std::process::id();
        if caller == self.0 { Ok(()) } else { Err(Error::Forked { owner: self.0, caller }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_is_refused() {
        Owner::this_process().check().expect("this process");
        let error = Owner(std::process::id() + 1).check().expect_err("another process");
        assert!(matches!(error, Error::Forked { .. }));
    }
}
