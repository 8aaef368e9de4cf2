//! The cuRAND functions that Candle calls when it opens a device. Our programs do not draw random
//! numbers with them.

// These are functions of a C library, which take pointers from the caller.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};

#[unsafe(no_mangle)]
extern "C" fn curandCreateGenerator(generator: *mut *mut c_void, _kind: c_int) -> c_int {
    // SAFETY: the API asks for a pointer to a place for the handle. Nobody dereferences the handle.
    unsafe { generator.write(std::ptr::without_provenance_mut(1)) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn curandSetStream(_generator: *mut c_void, _stream: u64) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn curandSetPseudoRandomGeneratorSeed(_generator: *mut c_void, _seed: u64) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn curandDestroyGenerator(_generator: *mut c_void) -> c_int {
    0
}
