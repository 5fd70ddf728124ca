//! Stacks of threads. Alone in its process: other tests' threads would come and go between.

use std::thread::Builder;

use ferroelastic_core::sys::threads::builder;

/// A thread is known by the address of its descriptor, which lies in its stack.
fn identity() -> u64 {
    // SAFETY: it always succeeds.
    unsafe { libc::pthread_self() }
}

#[test]
fn no_stack_is_that_of_an_ended_thread() {
    const USUAL: usize = 8 << 20;
    let usual = || Builder::new().stack_size(USUAL).spawn(identity).expect("spawn").join().expect("no panic");
    let former = usual();
    // glibc's cache is there, and gives the stack of a thread that has ended to the next one of that size.
    assert_eq!(usual(), former);
    for _ in 0..8 {
        let ours = builder("ours").spawn(identity).expect("spawn").join().expect("no panic");
        assert_ne!(ours, former);
    }
    assert_eq!(usual(), former);
}
