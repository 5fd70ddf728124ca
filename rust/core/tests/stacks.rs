//! Stacks of threads. Alone in its process: other tests' threads would come and go between.

use std::os::unix::thread::{JoinHandleExt, RawPthread};
use std::thread::{Builder, JoinHandle};

use ferroelastic_core::sys::threads::builder;

/// A thread is known by the address of its descriptor, which lies in its stack.
fn identity(thread: JoinHandle<()>) -> RawPthread {
    let identity = thread.as_pthread_t();
    thread.join().expect("no panic");
    identity
}

#[test]
fn no_stack_is_that_of_an_ended_thread() {
    const USUAL: usize = 8 << 20;
    let usual = || identity(Builder::new().stack_size(USUAL).spawn(|| ()).expect("spawn"));
    let former = usual();
    // glibc's cache is there, and gives the stack of a thread that has ended to the next one of that size.
    assert_eq!(usual(), former);
    for _ in 0..8 {
        assert_ne!(identity(builder("ours").spawn(|| ()).expect("spawn")), former);
    }
    assert_eq!(usual(), former);
}
