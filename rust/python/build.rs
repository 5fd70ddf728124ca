//! Refuses free-threaded interpreters: `PyO3` would make a module for exactly that interpreter, and the package refuses the import.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if pyo3_build_config::get().is_free_threaded() {
        println!(
            "cargo::error=ferroelastic does not support free-threaded builds of CPython: \
             install it with an interpreter that has the GIL, or use torchrun"
        );
    }
}
