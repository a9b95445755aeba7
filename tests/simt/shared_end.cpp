thread_local unsigned char simt_shared_end;  // linked after the kernels
