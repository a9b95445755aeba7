thread_local unsigned char simt_shared_begin;  // linked before the kernels
