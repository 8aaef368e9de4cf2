//! The cuRAND functions that Candle calls when it opens a device. Our programs do not draw random
//! numbers with them.

// These are functions of a C library, which take pointers from the caller.
#![allow(unsafe_code)]

use crate::driver::{functions, give};
use std::ffi::{c_int, c_void};

functions! {
    fn curandCreateGenerator(generator: *mut *mut c_void, _kind: c_int) {
        // Nobody dereferences the handle.
        give(generator, std::ptr::without_provenance_mut(1))
    }

    fn curandSetStream(_generator: *mut c_void, _stream: u64) {
        Ok(())
    }

    fn curandSetPseudoRandomGeneratorSeed(_generator: *mut c_void, _seed: u64) {
        Ok(())
    }

    fn curandDestroyGenerator(_generator: *mut c_void) {
        Ok(())
    }
}
